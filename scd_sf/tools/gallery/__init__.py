"""The static viewer: finished videos and figures become one HTML file."""
