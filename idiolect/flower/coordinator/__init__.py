"""The coordinator: it trains in rounds with the sites that have joined."""
