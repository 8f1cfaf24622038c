"""What consumes data: PPO mathematics and DeepSpeed ranks. Knows neither Ray nor vLLM."""
