"""Methods to compare with: estimators of the same number, penalties, and other measures of sensitivity."""
