"""What is watched of the model itself while it trains: its residual stream, its experts, its zeros."""
