"""Prediction and evaluation by many workers on one machine or a cluster, with Ray Data (extra `ray`)."""
