"""Settings of every test."""

from hypothesis import settings

# A machine that does something else beside the tests is no defect; `timeout` bounds each test.
settings.register_profile("halfbyte", deadline=None)
settings.load_profile("halfbyte")
