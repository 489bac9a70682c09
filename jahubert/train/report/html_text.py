"""The words of the report page, English and Japanese."""

# name: (English, Japanese)
_BOTH = {
    "results": ("Results", "結果"),
    "training": ("Training", "学習"),
    "units": ("Units", "ユニット"),
    "worst": ("Worst utterances", "誤りの多い発話"),
    "settings": ("Settings and provenance", "設定と来歴"),
    "wer": ("lowest WER", "最小 WER"),
    "per": ("lowest PER", "最小 PER"),
    "corpus": ("corpus", "コーパス"),
    "computing": ("computing", "計算時間"),
    "system": ("system", "システム"),
    "labels": ("labels", "ラベル付き音声"),
    "updates": ("updates", "更新回数"),
    "kana_cer": ("kana CER %", "仮名 CER %"),
    "utterances": ("utterances", "発話"),
    "published": ("published", "論文"),
    "results_note": (
        "95 % bootstrap intervals over utterances in brackets. A word is its sequence of phones, so WER "
        "compares pronunciations. No language model.",
        "角括弧は発話単位のブートストラップによる 95 % 信頼区間。単語は音素列として比較する。"
        "言語モデルなし。",
    ),
    "training_line": ("training", "学習"),
    "validation_line": ("validation", "検証"),
    "training_note": ("against the number of updates", "横軸は更新回数"),
    "metric_loss": ("loss", "損失"),
    "metric_accuracy": ("accuracy on masked frames", "マスクしたフレームの正解率"),
    "metric_penalty": ("mean square of the conv features", "畳み込み特徴の二乗平均"),
    "metric_grad_norm": ("gradient norm", "勾配のノルム"),
    "metric_lr": ("learning rate", "学習率"),
    "metric_speed": ("updates a second", "毎秒の更新回数"),
    "metric_waiting": ("share of time waiting for data", "データ待ちの割合"),
    "metric_blank": ("share of frames that are blank", "ブランクの割合"),
    "metric_per": ("PER (greedy)", "PER(貪欲)"),
    "metric_wer": ("WER (greedy)", "WER(貪欲)"),
    "phone_purity": ("phone purity", "音素純度"),
    "cluster_purity": ("cluster purity", "クラスタ純度"),
    "used": ("used", "使用数"),
    "phone_times": ("phone times", "音素の時刻"),
    "layer": ("layer", "層"),
    "last_model": ("last model", "最後のモデル"),
    "layers": ("PNMI of units of each layer; dashed: of MFCCs", "各層のユニットの PNMI。破線は MFCC"),
    "usage": (
        "share of frames of each unit (%), the most frequent first; dashed: even use",
        "各ユニットのフレームの割合(%)、多い順。破線は均等な場合",
    ),
    "matrix": (
        "P(phone | unit): a row a phone, a column a unit, by its most frequent phone",
        "P(音素 | ユニット)。行は音素、列はユニット(最も多い音素の順)",
    ),
    "worst_note": (
        "Highest phone error rate first. Waveform, spectrogram (kHz) with the phones where their times are "
        "known, and the units.",
        "音素誤り率の高い順。波形、スペクトログラム(kHz)と音素(時刻が分かる場合)、ユニット。",
    ),
    "sub": ("substitution", "置換"),
    "del": ("deletion", "脱落"),
    "ins": ("insertion", "挿入"),
    "picture": ("waveform, spectrogram and units", "波形・スペクトログラム・ユニット"),
    "reference": ("reference", "正解"),
    "hypothesis": ("hypothesis", "認識結果"),
    "finished": ("finished", "終了"),
}
TEXT = {
    language: {name: words[number] for name, words in _BOTH.items()}
    for number, language in enumerate(("en", "ja"))
}
