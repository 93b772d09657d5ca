"""Run layers over data: observers, blends, one layer in memory at a time."""
