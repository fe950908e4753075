"""What torch's C++ code says to stderr: errors only, unless the user wants more. To be imported before torch.

Of a connection that ends it would print its own stack, fifty lines in front of the one that says what has happened.
"""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
