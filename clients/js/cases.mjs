// What every script here shares; the same as python/cases.py in its way.
export const BASE = process.env.HALFBYTE_URL ?? "http://127.0.0.1:8000";
export const V1 = BASE + "/v1";
export const MODEL = "tiny";
export const CALL = '@call get_weather {"city":"Rome"}';
export const SAID = "It is sunny in Rome.";
export const TOOLS_SCRIPT = CALL + "\n@say " + SAID;
export const STREAM_SCRIPT = "@say One, two, three, four, five.";
export const THOUGHT_SCRIPT = "@think Let me see. ;; @say Four.";
export const PERSON = '{"name":"Ada","age":36}';
export const PERSON_SCRIPT = "@say " + PERSON;
export const ADA = { name: "Ada", age: 36 };
export const WEATHER_SCHEMA = {
  type: "object", properties: { city: { type: "string" } }, required: ["city"],
  additionalProperties: false,
};
export const WEATHER = {
  type: "function",
  function: { name: "get_weather", description: "The weather.", parameters: WEATHER_SCHEMA },
};
// A red square of 28 pixels.
export const PNG_BASE64 = process.env.PNG_BASE64;
export const PNG_URL = "data:image/png;base64," + PNG_BASE64;

export function equal(got, wanted) {
  const [a, b] = [JSON.stringify(got), JSON.stringify(wanted)];
  if (a !== b) throw new Error(`got ${a}, wanted ${b}`);
}

export async function run(cases) {
  const chosen = process.argv.slice(2);
  for (const [name, work] of Object.entries(cases)) {
    if (chosen.length && !chosen.includes(name)) continue;
    let said;
    try {
      said = { case: name, ok: true, note: (await work()) ?? "" };
    } catch (error) {
      console.error(error);
      said = { case: name, ok: false, note: String(error).slice(0, 400) };
    }
    console.log(JSON.stringify(said));
  }
  process.exit(0);
}
