#!/usr/bin/env python3
"""`fdiff submit` from a checkout: python launch/submit.py --nodes 2 --tasks_per_node 4 --preset celeba-k8"""

import os
import sys

os.execv(sys.executable, [sys.executable, "-m", "fdiff", "submit", *sys.argv[1:]])
