"""`python -m labkit.race`; where this is imported, still the function `labkit.race`."""

import sys

from labkit import callable_module

if __name__ == "__main__":
    from labkit.instruments.race.command import main

    sys.exit(main())

from labkit.instruments.race.track import race

callable_module(race, __name__)
