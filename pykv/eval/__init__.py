"""What a lossy cache costs: KL, top-1 agreement and perplexity of continuations, and needles found.

continuation   a text goes on after its cache was rounded, coded or evicted
needles        facts hidden in filler are asked for
changes        what may be done to a cache, for both
"""
