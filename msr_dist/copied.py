"""What the process loads first of which local ranks are copies: from here on it does not look for garbage.

What it loads is none, and a search would touch, hence copy, the memory that ranks share. Each of them looks for its own
from when it is made: see `launch.loaded`.
"""

import gc

gc.disable()
