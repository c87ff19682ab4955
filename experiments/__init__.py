"""Scripts to run, or to submit as Ray jobs: `python -m experiments.NAME`. Nothing imports them.

Ray reads this once, when it is imported: a cell of this machine is on 127.0.0.1, and so is whoever
joins it, unless a cluster elsewhere is named.
"""

import os

from actors.local_ray import ADDRESS, CLUSTER

if os.environ.get(ADDRESS, "127.").startswith("127."):
    os.environ.setdefault(CLUSTER, "0")
