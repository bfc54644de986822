"""Lists of prompts: filtered, written out at length."""
