from pathlib import Path

__version__ = "0.1.0"

PACKAGE = Path(__file__).parent
IS_CHECKOUT = not (PACKAGE / "conf").is_dir()  # only an installed package has conf/ inside it
ROOT = PACKAGE.parent.resolve()  # of the checkout, if it is one
CONF = ROOT / "conf" if IS_CHECKOUT else PACKAGE / "conf"
RECORDS = (
    ROOT / "outputs" / "record" if IS_CHECKOUT and (ROOT / "outputs" / "record").is_dir() else None
)  # the folder of the records that come with a checkout; None without it
