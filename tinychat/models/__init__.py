"""The models. One class serves every supported architecture; config.py knows their differences."""
