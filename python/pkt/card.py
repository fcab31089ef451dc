def model_card(manifest, base): return "x"
