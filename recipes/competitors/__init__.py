"""Methods of other authors: estimators of the same number, penalties, and other measures of sensitivity."""
