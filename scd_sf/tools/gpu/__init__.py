"""`make gpu`: independent measurements of this project on one GPU, in ten minutes."""
