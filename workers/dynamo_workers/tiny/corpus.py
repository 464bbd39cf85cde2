"""The text that the bundled tokenizer is trained on.

Written for this project, so that the tokenizer has no third-party vocabulary in it. A byte-level
BPE trainer sees only how often each word (with its leading space) occurs, so a list of common
English words with falling frequencies teaches the same merges as pages of prose; some prose,
code, JSON and other scripts are added for punctuation, indentation and multi-byte characters.
"""

from collections.abc import Iterator

COMMON_WORDS = """
the of and to a in is that it for was on are as with be at by this have from or one had not but
what all were when we there can an your which their said if do will each about how up out them then
she many some so these would other into has more her two like him see time could no make than first
been its who now people my made over did down only way find use may water long little very after
words called just where most know get through back much before go good new write our used me man
too any day same right look think also around another came come work three word must because does
part even place well such here take why things help put years different away again off went old
number great tell men say small every found still between name should home big give air line set
own under read last never us left end along while might next sound below saw something thought both
few those always looked show large often together asked house world going want school important
until form food keep children feet land side without boy once animals life enough took sometimes
four head above kind began almost live page got earth need far hand high year mother light parts
country father let night following picture being study second eyes soon times story boys since
white days ever paper hard near sentence better best across during today others however sure means
knew try told young miles sun ways thing whole hear example heard several change answer room sea
against top turned learn point city play toward five using himself usually money seen didn't car
morning given body trees horse money north book books carry science eat room friends began idea
fish mountain stop base hear cut song family group music color face list mark state order red door
sure become ship area half rock fire south problem piece pass space true east hundred minute strong
special mind behind clear tail produce fact street inch multiply nothing course stay wheel full
force blue object decide surface deep moon island foot system busy test record boat common gold
possible plane dry wonder laugh thousand ago ran check game shape hot miss brought heat snow bring
yes distant fill east paint language among grand ball yet wave drop heart present heavy dance
engine position arm wide sail material size vary settle speak weight general ice matter circle pair
include divide felt perhaps pick sudden count square reason length represent art subject region
energy hunt bed brother egg ride cell believe fraction forest sit race window store summer train
sleep prove lone leg exercise wall catch mount wish sky board joy winter written wild instrument
kept glass grass cow job edge sign visit past soft fun bright gas weather month million bear finish
happy hope flower clothe strange gone jump baby eight village meet root buy raise solve metal
whether push seven paragraph third shall held hair describe cook floor either result burn hill safe
cat century consider type law bit coast copy phrase silent tall sand soil roll temperature finger
industry value fight lie beat excite natural view sense capital won't chair danger fruit rich thick
soldier process operate practice separate difficult doctor please protect noon crop modern element
hit student corner party supply bone rail imagine provide agree thus gentle woman captain guess
necessary sharp wing create neighbor wash bat rather crowd corn compare poem string bell depend
meat rub tube famous dollar stream fear sight thin triangle planet hurry chief colony clock mine
tie enter major fresh search send yellow gun allow print dead spot desert suit current lift rose
arrive master track parent shore division sheet substance favor connect post spend chord fat glad
original share station dad bread charge proper bar offer segment duck instant market degree
populate chick dear enemy reply drink occur support speech nature range steam motion path liquid
log meant quotient teeth shell neck oxygen sugar death pretty skill women season solution magnet
silver thank branch match suffix especially fig afraid huge sister steel discuss forward similar
guide experience score apple bought led pitch coat mass card band rope slip win dream evening
condition feed tool total basic smell valley nor double seat continue block chart hat sell success
company subtract event particular deal swim term opposite wife shoe shoulder spread arrange camp
invent cotton born determine quart nine truck noise level chance gather shop stretch throw shine
property column molecule select wrong gray repeat require broad prepare salt nose plural anger
claim continent
"""

FIELD_WORDS = """
hello hi
token tokens tokenizer request requests response responses prompt prompts prefix prefill decode
decoding block blocks cache cached caching model models engine engines worker workers router
routing route routed gateway endpoint endpoints frontend backend cluster graph operator controller
resource resources manifest namespace deployment service services container containers pod pods
node nodes label labels annotation annotations replica replicas rollout readiness liveness probe
probes health healthy ready status condition conditions reason message messages system user
assistant tool tools function functions call calls argument arguments content role name type object
array string number integer boolean null true false default value values field fields schema
version config configuration option options flag flags command commands environment variable
variables file files folder path paths address addresses port ports host socket stream streams
streaming chunk chunks event events subscriber publisher snapshot sequence batch batches batching
scheduler schedule scheduling queue queued waiting running memory processor latency throughput
bandwidth histogram counter gauge metric metrics measure measured seconds milliseconds bytes header
headers body bodies error errors warning failure failures failed retry retries timeout deadline
limit limits budget capacity usage load loaded balance balanced choose chosen choice decision
decisions candidate candidates score scores cost policy policies plugin plugins server servers
client clients proxy connection connections network protocol process processes thread threads task
tasks asynchronous await return import class define method parameter parameters attribute
attributes property dictionary iterator generator exception assertion compile compiler runtime
library package packages module modules dependency dependencies repository commit branch release
changelog license documentation architecture reference example examples tutorial install installed
installation build built binary image images registry attention transformer layer layers hidden
vocabulary embedding embeddings vector vectors matrix tensor tensors weight weights gradient
training inference generate generated generation sampling temperature greedy beam eviction evict
evicted oldest recently least hash hashes hashing key keys index indexes tree root parent chain
chained seed random deterministic probability distribution average median percentile maximum
minimum temperature weather forecast translate translation summarize summary explain explanation
question questions conversation history instructions helpful concise detailed
"""

PREFIXES = ("un", "re", "pre", "over", "under", "inter", "multi", "non")
SUFFIXES = ("s", "ed", "ing", "er", "ly", "ment", "ness", "able", "tion", "ity", "ous", "ful")

PROSE = """
You are a helpful assistant. Answer briefly, and say so when you do not know.
You are a careful engineer. Explain each step before you take it, and check the result afterwards.
The request arrives at the gateway, is turned into tokens, and goes to the worker that already holds
the longest part of its prefix. The worker computes what is missing and streams the answer back, one
token after the other, until it meets the end of the turn or the limit that the client has set.
A block holds a fixed number of tokens. Blocks are kept in the order in which they were last used;
when memory runs out, the block that nobody has needed for the longest time is given away first.
What is the capital of the country in the north, and how many people live there today?
Please write a short story about a small boat, an old lighthouse and a very patient cat.
Translate the following sentence into German, then into French, and keep the numbers as they are.
Here is a list of the things we need: bread, apples, coffee, two kinds of cheese, and a sharp knife.
I'd say that it isn't what we've wanted; they'll see that you're right, and she doesn't mind at all.
Once upon a time, in a valley between two mountains, there was a village whose clock never stopped.
In 1969, 12 people measured 3,141 samples at 20.5 degrees; 97% of them were within 0.5% of the mean.
See https://example.com/docs/index.html?page=2&sort=name#top or write to someone@example.org.
First, read the question twice. Second, note what is given. Third, decide what has to be found.
- one item in a list
- another item, with `code` in it, **bold** and _italic_ words
1. Start the server.
2. Ask it something.
3. Stop it again.
# A heading
## A smaller heading
| column | value | remark |
|---|---|---|
| latency | 12.5 ms | median of 1,000 requests |
> A quotation, with a reply below it.
"""

CODE = '''
import asyncio
import json
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Request:
    """What a client has asked for."""

    prompt: str
    max_tokens: int = 16
    stream: bool = False
    metadata: dict[str, str] = field(default_factory=dict)

    def tokens(self) -> list[int]:
        return [ord(character) for character in self.prompt]


async def main() -> None:
    queue: asyncio.Queue[Request] = asyncio.Queue()
    for number in range(10):
        if number % 2 == 0 and number != 4:
            await queue.put(Request(prompt=f"number {number}"))
        else:
            continue
    while not queue.empty():
        request = await queue.get()
        print(json.dumps({"prompt": request.prompt, "tokens": request.tokens()}))


if __name__ == "__main__":
    asyncio.run(main())

function add(left, right) {
  const total = left + right;
  return total === 0 ? null : total;
}

for (let i = 0; i < items.length; i++) {
    console.log(items[i].name, items[i].value);
}

SELECT name, count(*) AS total FROM requests WHERE status = 200 GROUP BY name ORDER BY total DESC;

#!/bin/sh
set -eu
curl -s -X POST http://localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
  -d '{"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": true}'
kubectl apply -f graph.yaml && kubectl get pods -n default --watch
'''

DATA = """
{"type": "function", "function": {"name": "get_weather", "description": "Current weather of a city",
"parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Name of
the city"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}}, "required": ["city"]}}}
{"name": "get_weather", "arguments": {"city": "Oslo", "unit": "celsius"}}
{"name": "search", "arguments": {"query": "prefix caching", "limit": 10, "offset": null}}
{"temperature": 21.5, "condition": "sunny", "humidity": 0.4, "wind": {"speed": 3, "from": "NW"}}
apiVersion: nvidia.com/v1beta1
kind: DynamoGraphDeployment
metadata:
  name: example
  labels:
    app: example
spec:
  components:
  - name: frontend
    replicas: 1
  - name: worker
    replicas: 2
    podTemplate:
      spec:
        containers:
        - name: main
          image: example/worker:latest
          args: ["--model", "tiny", "--block-size", "32"]
"""

OTHER_SCRIPTS = """
Guten Morgen! Wie spät ist es? Die Straße führt über den Fluss und dann nach Süden.
Können Sie mir bitte erklären, warum das größere Gefäß schneller voll wird?
Bonjour, où est la gare ? Le garçon a mangé une crêpe près de la forêt, à côté de l'église.
¿Cómo estás? Mañana iré al mercado para comprar azúcar, pan y una piña pequeña.
Olá, tudo bem? A manhã está fria, mas o coração não.
Dzień dobry, proszę o kawę i trochę mleka. Źródło leży za wzgórzem.
Добрый день, как вас зовут? Мы идём домой по длинной дороге.
Καλημέρα, πώς είστε; Το νησί είναι μικρό.
你好，世界。今天的天气很好，我们去公园吧。请问这个多少钱？
こんにちは世界。今日はとても良い天気です。駅はどこですか。
안녕하세요 세계. 오늘은 날씨가 좋습니다.
مرحبا بالعالم، كيف حالك اليوم؟
नमस्ते दुनिया, आज मौसम अच्छा है।
Emoji: 🙂 🚀 👩‍💻 🎉 ❤️ and signs: → ← ≤ ≥ × ÷ ± √ ∑ € £ § … – — “quoted” ‘single’ « guillemets »
"""


def texts() -> Iterator[str]:
    """The training texts, in a fixed order; the frequencies fall with a word's rank."""
    common, field = COMMON_WORDS.split(), FIELD_WORDS.split()
    for rank, word in enumerate(common + field):
        # Field words start again near the top, so that they are learned whole as well.
        times = 2 + 2000 // (10 + rank % len(common))
        yield f" {word}" * times
        yield f"{word.capitalize()}\n {word.capitalize()}\n" * (1 + times // 8)
        yield f"\n{word} " * (1 + times // 8)
    for word in common[:400] + field:
        if len(word) > 3:
            yield " ".join(word + suffix for suffix in SUFFIXES)
            yield " ".join(prefix + word for prefix in PREFIXES)
    for text in (PROSE, CODE, DATA):
        yield text * 8
    yield OTHER_SCRIPTS * 3
    yield " ".join(str(number) for number in range(1000))
