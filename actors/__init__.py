"""What produces data: prompts, vLLM generators and reward models. Knows neither Ray nor DeepSpeed nor the learner."""
