"""Checks of schedules, processes, discretizations and denoisers."""
