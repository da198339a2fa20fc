"""Statistics of outcomes measured once per image: units, intervals, tests, power."""
