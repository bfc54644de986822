"""`scd plan`: what a stage of training needs, counted before any machine is rented."""
