"""Videos over HTTP: jobs that survive a restart, made in processes that may die, by OpenAI's /v1/videos."""
