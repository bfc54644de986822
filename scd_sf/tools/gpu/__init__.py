"""`make gpu`: what a single GPU shows of this project in ten minutes, in parts that do not depend
on each other."""
