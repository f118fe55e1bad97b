"""Programs for people who measure; run from the checkout, not installed."""
