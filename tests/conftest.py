import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# read once, when torch is loaded: spinning threads make a suite ten times slower as soon as anything runs beside it
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
