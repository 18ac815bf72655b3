"""`python -m labkit.diagnose`; where this is imported, still the function `labkit.diagnose`."""

import sys

from labkit import callable_module

if __name__ == "__main__":
    from labkit.instruments.command import main

    sys.exit(main())

from labkit.instruments.diagnosis import diagnose

callable_module(diagnose, __name__)
