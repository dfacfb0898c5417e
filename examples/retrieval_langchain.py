"""python examples/retrieval_langchain.py URL DOCUMENT QUESTION: a question answered from a document, by LangChain.

URL is a server's, such as `python -m infer serve MODEL` starts: http://127.0.0.1:8000/v1. It embeds the parts of the
document and the question (/v1/embeddings); the three parts that are nearest go into the prompt of its chat. DOCUMENT is
text, a part to a line, or JSONL with `text`. Needs langchain-openai.
"""

import json
import sys
from pathlib import Path

from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai import OpenAI

SHOWN, MOST = 3, 200


def parts_of(path: Path) -> list[str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        lines = [json.loads(line)["text"] for line in lines]
    return list(dict.fromkeys(lines))[:MOST]


def main(url: str, document: str, question: str) -> None:
    model = next(iter(OpenAI(base_url=url, api_key="none").models.list())).id
    # The length check would ask for OpenAI's own tokenizer.
    embeddings = OpenAIEmbeddings(model=model, base_url=url, api_key="none", check_embedding_ctx_length=False)
    store = InMemoryVectorStore(embeddings)
    store.add_texts(parts_of(Path(document)))
    found = [each.page_content for each in store.similarity_search(question, k=SHOWN)]
    for number, text in enumerate(found, 1):
        print(f"[{number}] {text}")
    chat = ChatOpenAI(model=model, base_url=url, api_key="none", temperature=0, max_tokens=60)
    told = "\n".join(found)
    print(chat.invoke(f"{told}\n\n{question}").content)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
