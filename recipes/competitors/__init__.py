"""What others compute: estimators of the same number, penalties, and other measures of sensitivity."""
