from memory.inference_terms import InferenceTerms
def predicted_arguments(job, chip):
    terms = InferenceTerms(job, chip)
    return terms.weights + sum(terms.cache.values()) + terms.inputs("prefill")
def predict_inference(job, chip): ...
