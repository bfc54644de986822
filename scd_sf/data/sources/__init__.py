"""Clips of pixels in the layouts of others: TECO, FAR, UCF-101, RealEstate10K; files are read in
place."""
