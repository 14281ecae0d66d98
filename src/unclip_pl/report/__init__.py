"""Reports: tables, plots and pages of what was measured."""
