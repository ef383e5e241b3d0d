"""pykv inside other programs: modules for each library, which pykv itself never imports."""
