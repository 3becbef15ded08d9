// The official Resend SDK for Node, unmodified. Prints one line of JSON per step; tests/node/test_resend_node.py reads them.
// usage: node resend.mjs <folder with node_modules> <base url> <api key>
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [folder, baseUrl, key] = process.argv.slice(2);
const { Resend } = createRequire(pathToFileURL(`${folder}/`))("resend");
const resend = new Resend(key, { baseUrl });
const mail = { from: "Acme <hello@example.com>", to: ["ada@example.org"], subject: "The night mail", html: "<p>hi</p>" };
const show = (step, { data, error, headers }) =>
  console.log(JSON.stringify({ step, data, error, replayed: headers?.["idempotent-replayed"] ?? null }));

const sent = await resend.emails.send({
  ...mail,
  replyTo: "desk@example.com",
  tags: [{ name: "category", value: "night_mail" }],
  attachments: [{ filename: "a.bin", content: Buffer.from([0, 255, 1]), contentId: "logo" }],
});
show("send", sent);
show("get", await resend.emails.get(sent.data.id));
const later = await resend.emails.send({ ...mail, scheduledAt: "in 1 hour" });
show("send scheduled", later);
show("update", await resend.emails.update({ id: later.data.id, scheduledAt: "in 2 hours" }));
show("cancel", await resend.emails.cancel(later.data.id));
show("cancel again", await resend.emails.cancel(later.data.id));
show("list", await resend.emails.list({ limit: 1 }));
show("list after", await resend.emails.list({ limit: 1, after: later.data.id }));
show("batch strict", await resend.batch.send([mail, mail]));
show("batch strict refused", await resend.batch.send([mail, { ...mail, to: "nobody" }]));
show("batch permissive", await resend.batch.send([mail, { ...mail, to: "nobody" }], { batchValidation: "permissive" }));
show("idempotent", await resend.emails.send(mail, { idempotencyKey: "one" }));
show("idempotent again", await resend.emails.send(mail, { idempotencyKey: "one" }));
show("idempotent other", await resend.emails.send({ ...mail, subject: "x" }, { idempotencyKey: "one" }));
show("missing", await resend.emails.get("01a206aa-e4a1-734f-a2d1-eda46887c7d0"));
show("wrong key", await new Resend("nm_live_wrong", { baseUrl }).emails.send(mail));
show("suppress", await resend.suppressions.add({ email: "bob@example.org" }));
show("suppression", await resend.suppressions.get("bob@example.org"));
show("suppressions", await resend.suppressions.list({ origin: "manual" }));
show("lift", await resend.suppressions.batch.remove({ emails: ["bob@example.org"] }));
const made = await resend.apiKeys.create({ name: "ci" });
show("key", made);
show("keys", await resend.apiKeys.list());
show("key gone", await resend.apiKeys.remove(made.data.id));
const hook = await resend.webhooks.create({ endpoint: "https://hooks.example.com/", events: ["email.bounced"] });
const webhookId = hook.data.id;
show("webhook", hook);
show("webhook got", await resend.webhooks.get(webhookId));
show("webhook changed", await resend.webhooks.update(webhookId, { events: ["email.sent"], status: "disabled" }));
show("webhook replay refused", await resend.webhooks.events.replay({ webhookId, eventId: sent.data.id }));
show("webhook enabled", await resend.webhooks.update(webhookId, { status: "enabled" }));
show("webhooks", await resend.webhooks.list({ limit: 1 }));
// No method of theirs: ours, so that there is an event to look at.
const tested = await resend.post(`/webhooks/${webhookId}/test`);
const eventId = tested.data.id;
show("webhook test", tested);
show("webhook events", await resend.webhooks.events.list({ webhookId, limit: 1 }));
show("webhook event", await resend.webhooks.events.get({ webhookId, eventId }));
show("webhook attempts", await resend.webhooks.events.attempts.list({ webhookId, eventId }));
show("webhook replay", await resend.webhooks.events.replay({ webhookId, eventId }));
show("webhook rotated", await resend.webhooks.rotateSigningSecret(webhookId));
show("webhook gone", await resend.webhooks.remove(webhookId));
show("webhook missing", await resend.webhooks.get(webhookId));
show("not built", await resend.domains.list());
