"""pykv inside other programs: a file for each library, imported by nobody but its users."""
