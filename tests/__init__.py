import gc

gc.set_threshold(100_000, 50, 100)  # imports and graphs make many objects and few cycles
