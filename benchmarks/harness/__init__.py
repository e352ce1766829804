"""What every suite is measured with: cases, ceilings, the check, the clock, the results file."""
