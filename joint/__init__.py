"""A joint retrieval / pre-ranking / ranking trainer.

Only the thread settings live here, because they must be in the environment before torch is loaded: one thread a
process (ranks are the unit of parallelism; a run has those of its config, `train.threads`) and no spinning between
parallel regions, which on a busy machine costs more than the arithmetic.
"""

import os

__version__ = "0.1.0"

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
