"""The Lightning callbacks, installed as `nslightning.callbacks`."""

if __name__ == "callbacks":
    raise ImportError(
        "`import callbacks` found nslightning.callbacks only because Python started in the checkout; this "
        "second copy would fail every isinstance check. Write `from nslightning.callbacks import ...`."
    )
