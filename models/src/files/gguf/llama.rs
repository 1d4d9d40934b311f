//! What a GGUF file says about a Llama: its configuration, and its tensors under Hugging Face names.
