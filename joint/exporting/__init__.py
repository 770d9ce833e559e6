"""From a run to a folder that serves without torch: graphs, tables, vectors, an index, a manifest and a self-check."""
