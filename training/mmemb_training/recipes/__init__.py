"""What a run is told before it starts (recipes), what it trains (shapes), and what that takes (one estimate)."""
