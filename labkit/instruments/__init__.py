"""Where the time went: timers, monitor, plots. They watch and draw, and change nothing."""
