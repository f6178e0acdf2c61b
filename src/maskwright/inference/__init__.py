"""From images to segmentations."""
