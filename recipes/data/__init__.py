"""Data sets of labelled images as LightningDataModules."""
