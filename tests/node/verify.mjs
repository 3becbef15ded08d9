// Reads [{secret, headers, body}] and says which of the official libraries accept each.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const require = createRequire(`${process.argv[2]}/package.json`);
const svix = require("svix");
const standardwebhooks = require("standardwebhooks");
const { Resend } = require("resend");

const pick = (headers, family) => ({
  [`${family}-id`]: headers[`${family}-id`],
  [`${family}-timestamp`]: headers[`${family}-timestamp`],
  [`${family}-signature`]: headers[`${family}-signature`],
});

const verifiers = {
  svix: ({ secret, headers, body }) => new svix.Webhook(secret).verify(body, pick(headers, "svix")),
  "svix, webhook headers": ({ secret, headers, body }) =>
    new svix.Webhook(secret).verify(body, pick(headers, "webhook")),
  standardwebhooks: ({ secret, headers, body }) =>
    new standardwebhooks.Webhook(secret).verify(body, pick(headers, "webhook")),
  resend: ({ secret, headers, body }) =>
    new Resend("re_none").webhooks.verify({
      payload: body,
      webhookSecret: secret,
      headers: {
        id: headers["svix-id"],
        timestamp: headers["svix-timestamp"],
        signature: headers["svix-signature"],
      },
    }),
};

const cases = JSON.parse(readFileSync(0, "utf8"));
const found = cases.map((one) =>
  Object.fromEntries(
    Object.entries(verifiers).map(([name, verify]) => {
      try {
        verify(one);
        return [name, "accepted"];
      } catch (error) {
        return [name, `refused: ${error.message}`];
      }
    }),
  ),
);
console.log(JSON.stringify(found));
