"""What this machine offers and lacks, each with a remedy (``scd doctor``)."""
