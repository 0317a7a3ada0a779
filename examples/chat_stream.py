"""A conversation, printed as it is generated."""

from atom import LLM, SamplingParams

QUESTIONS = ["Name three planets.", "Which of them is the largest?"]

if __name__ == "__main__":
    with LLM(model="smollm2", max_model_len=2048, enable_prefix_caching=True) as llm:
        messages = [{"role": "system", "content": "You answer briefly."}]
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            print("user:", question, "\nassistant: ", end="")
            answer = ""
            for output in llm.stream(llm.chat_prompt(messages), SamplingParams(temperature=0, max_tokens=100)):
                for delta in output.outputs:
                    print(delta.text, end="", flush=True)
                    answer += delta.text
            print()
            messages.append({"role": "assistant", "content": answer})
