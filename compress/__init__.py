"""Trained weights made smaller: quantised, pruned, factored; what calibration they want."""
