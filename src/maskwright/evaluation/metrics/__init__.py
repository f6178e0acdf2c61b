"""Metrics, by the rules of COCO, Cityscapes and MMSegmentation."""
